"""The networks, their released weights, and the latent space of every autoencoder."""
