"""Records of many formats, the manifest they are normalised into, the order of an epoch, and ready samples."""
