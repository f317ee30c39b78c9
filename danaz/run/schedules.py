"""The names that the config key ``schedule`` takes: the order in which simulated workers push.

The orders themselves are in danaz/simulate/orders.py.
"""

SCHEDULES = ("round-robin", "block-random", "gamma", "gamma-heterogeneous")
SCHEDULE_FORMS = {"constant": "constant:SPEED,SPEED,…", "trace": "trace:RUN"}  # name -> the name with its argument
