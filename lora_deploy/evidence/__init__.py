"""Evidence: what is measured about a result, each figure with its tolerance and the reason for it, and a verdict.

Promise: a verdict is a value, never an exception; what could not be checked is inconclusive, never passed (law 9).
"""
