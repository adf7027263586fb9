"""Merging: decide every output byte (``plan``), compute it (``shard``, ``exact``), write it so that nothing is lost.

Promise: laws 1 to 6 of the architecture. It never opens an adapter file and knows no format.
"""
