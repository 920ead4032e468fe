"""The fakes that EADT ships."""
