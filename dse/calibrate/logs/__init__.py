"""Readers of what benchmark tools write."""

from dse.calibrate.logs.read import FORMATS, LogRows, checked, is_log, load_json, parse_given, read_log, sidecar

__all__ = ["FORMATS", "LogRows", "checked", "is_log", "load_json", "parse_given", "read_log", "sidecar"]
