"""The release folder: weights, graphs, evidence, card, report and manifest, put together and checked as one thing."""
