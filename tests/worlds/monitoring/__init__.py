"""What Graft's programs expose to Prometheus. It knows no alert and no dashboard."""
