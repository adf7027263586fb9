"""Where releases go: one file a kind of hub, each behind the protocol in ``interface``."""
