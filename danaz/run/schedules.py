"""The values of the config key ``schedule``, which says in which order simulated workers push.

danaz/simulate/orders.py makes the orders.
"""

SCHEDULES = ("round-robin", "block-random", "gamma", "gamma-heterogeneous")
SCHEDULE_FORMS = {"constant": "constant:SPEED,SPEED,…", "trace": "trace:RUN"}  # name -> the name with its argument
