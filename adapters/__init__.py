"""One thin module a framework, binding the core's recursions to its autodiff; found by ``ic.fixed_point``."""
