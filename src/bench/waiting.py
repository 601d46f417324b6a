"""How threads wait, in every process that computes. No imports: the command line reads it at each start."""

WAITING = {"OMP_WAIT_POLICY": "passive"}
"""For the environment. OpenMP's threads spin while they wait, which beside other programs cost 3.6 times the time of a run.
On a quiet machine it makes steps of few tokens up to twice as long (SmolLM2-135M, 128 tokens, 2 threads: 0.86 against
0.41 s), so who measures must wait as who trains."""
