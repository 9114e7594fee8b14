"""The networks: vssd.py is the backbone and classifier; family.py creates them by name."""
