package pod

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
)

// Codes of Twill's own, from 100 on as the CNI specification asks. All other
// errors carry the specification's codes.
const (
	ErrDiffers uint = 100 // CHECK: the attachment is not as ADD left it
	ErrBridge  uint = 101 // the bridge is not one that pods of this node can use
)

// fail returns a CNI error. The message says what is wrong and what to do.
func fail(code uint, format string, a ...any) *types.Error {
	return types.NewError(code, fmt.Sprintf(format, a...), "")
}

// ioFail wraps an error of the kernel or of a file, unless it is a CNI error
// already.
func ioFail(doing string, err error) error {
	var known *types.Error
	if errors.As(err, &known) {
		return err
	}
	return fail(types.ErrIOFailure, "%s: %v", doing, err)
}
