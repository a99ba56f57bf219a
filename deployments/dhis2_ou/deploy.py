"""Create or update dhis2_ou/dhis2-ou from Python: the same as prefect.yaml does."""

from pathlib import Path

from dotenv import load_dotenv
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment

from prefect_fleet.release_folder import ReleaseFolder

ENTRYPOINT = "flow.py:dhis2_ou_flow"


def build_deployment() -> RunnerDeployment:
    """Return the deployment, not yet known to the API."""
    deployment = RunnerDeployment.from_entrypoint(
        str(Path(__file__).parent / ENTRYPOINT),
        name="dhis2-ou",
        description="Keeps all organisation units of one DHIS2 server as a Parquet file.",
        tags=["dhis2"],
        schedule=CronSchedule(cron="*/15 * * * *", timezone="UTC"),
        work_pool_name="default",
    )
    # Workers find the code in their own release, not where this program found it.
    deployment.entrypoint = ENTRYPOINT
    deployment.storage = ReleaseFolder("/opt/prefect/deployments/dhis2_ou")
    return deployment


if __name__ == "__main__":
    load_dotenv()
    print(build_deployment().apply())
