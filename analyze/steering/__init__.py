"""Steering: change dictionary features while pictures are drawn, and see what becomes of them.  Runs the model again, and counts it."""
