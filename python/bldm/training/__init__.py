"""Training of the autoencoder and the denoiser: one loop, two objectives."""
