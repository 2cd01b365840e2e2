"""What a device is: specification, profiles, detection."""
