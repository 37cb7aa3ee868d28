package httpapi

// Loopback opens loopback to tests.
var Loopback = loopback
