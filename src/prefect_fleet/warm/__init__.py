"""Flow runs that start in milliseconds: a process that has imported Prefect forks one child a run.

client      the work pool's `command`: asks for a run, forwards signals, ends as the run ends
parent      keeps a zygote running for as long as the socket is there
zygote      imports once, then forks one child a run
child       becomes the run: what `python -m prefect.engine` would have become
imports     what is imported beforehand, and what proved unfit for it
agreement   what a run and the zygote must have in common
usual       settings and logging that most runs have
sharing     what keeps their memory shared
internals   everything that relies on how Prefect works inside

Where any of it can't be right for a run, the client replaces itself with the stock command.
"""
