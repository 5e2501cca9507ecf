"""Data sets are saved by forks: `datasets` spawns processes for it, which import again all that their parent has."""

from multiprocess import context

context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]
