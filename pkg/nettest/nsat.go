package nettest

// NSAt is a namespace that somebody else made, such as a pod's of a container runtime:
// path is a file that holds it, and name is for logs. Programs that run in it see the
// machine's files. It is not removed with the lab.
func (l *Lab) NSAt(name, path string) *NS {
	return &NS{Name: name, Path: path, lab: l, env: l.environ}
}
