package main

const (
	healthy  = 200
	greeting = "hello\n"
)
