"""Pictures and records of where the forget and the retain gradient conflict."""

from sago.monitor.monitor import ConflictMonitor

__all__ = ["ConflictMonitor"]
