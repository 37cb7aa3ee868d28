package rollout

// Trace opens trace to tests, which look at every value on the way.
var Trace = trace
