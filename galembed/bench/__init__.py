"""`galembed bench`: how fast, how faithful and how large each engine of a backbone is on this machine.

`methods` lists what could run, `worker` is the process that each of them runs in, `process` its other end, `run` takes
the turns, `floors` says what no engine can beat, `report` and `pages` are what comes out.
"""
