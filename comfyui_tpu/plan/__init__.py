"""The planner: compiles a model for any TPU topology on any machine, and reports memory and time as estimated."""
