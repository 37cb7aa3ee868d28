// Package sim drives a real server: it starts one, types what an operator types,
// and simulates hosts that join, wait, fetch, apply and report as the agent does.
package sim
