"""What the scripts share and no run is without: pictures, metrics, rewards, networks."""
