// Command nothing does nothing: what executing it takes is what no plugin written
// in Go can do without.
package main

func main() {}
