"""Healing: train back what a plan cost, or train a model on."""
