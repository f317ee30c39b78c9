"""What a run is: its configuration, its settings, its folder and its locks."""
