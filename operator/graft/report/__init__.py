"""Render report.json as report.html, and several reports as one comparison (PURE: no files, no network, no torch)."""
