"""What runs beside Prefect on the hosts: the worker's launcher and the sweep for lost runs.

It is installed by the roles, apart from the releases: a deploy of flows neither changes nor
restarts it.
"""
