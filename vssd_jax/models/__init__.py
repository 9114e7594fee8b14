"""The networks: vssd.py is the backbone and classifier; registry.py creates them by name."""
