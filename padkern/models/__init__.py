"""The models: encoders, experts and their mixture under a frequency gate."""
