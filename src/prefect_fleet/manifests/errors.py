"""What can go wrong outside of a manifest; the messages say what to do."""


class ApiAway(RuntimeError):
    """The Prefect API does not answer or refuses."""


class ResultAway(RuntimeError):
    """A stored result can't be read now."""


class StoreError(RuntimeError):
    """The bucket of the copies refuses."""


class StoreAway(StoreError):
    """The bucket of the copies does not answer, or not now."""


class ConflictError(StoreError):
    """Somebody else has written the same object meanwhile."""


class AnotherPass(RuntimeError):
    """A pass over the same manifests is running."""
