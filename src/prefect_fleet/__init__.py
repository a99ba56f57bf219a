"""Programs and parts that run a fleet of Prefect hosts."""
