"""Attention over tokens that processes share: Ulysses, ring, and the joint attention of CogVideoX."""
