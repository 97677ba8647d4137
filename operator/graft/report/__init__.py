"""report.json -> report.html, and several of them -> one comparison (PURE: no files, no network, no torch)."""
