"""The flow that shows that a worker host runs flows, and the program that runs it there."""
