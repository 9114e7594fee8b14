"""The operations that decide the speed of VSSD, a folder each."""
