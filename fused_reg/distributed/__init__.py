"""Lists that are in several places: on several devices, or cut into shards (DTensor)."""
