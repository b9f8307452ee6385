"""Runs as folders of events; workers, queue and supervisor."""
