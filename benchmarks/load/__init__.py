"""Random jobs of several clients on too little memory, with a fault every half a minute, for as long as one likes.

:mod:`~benchmarks.load.desks` has the clients, each a process of its own, and what came of their jobs;
:mod:`~benchmarks.load.faults` does to the workers what machines do; :mod:`~benchmarks.load.__main__` is the command,
``python -m benchmarks load --minutes N [--stock]``. The jobs are those of :mod:`benchmarks.soak`, and so is the rule for what has grown.
"""
