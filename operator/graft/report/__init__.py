"""Render report.json as report.html, and several reports as one comparison (PURE).

It knows the document only. It opens no files and no connections, and it does not import torch.
"""
