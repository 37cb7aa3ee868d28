package image

// Describe reads what Open reads, from memory.
var Describe = describe
