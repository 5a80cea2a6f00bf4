package pod

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"reflect"

	"github.com/containernetworking/cni/pkg/types"
)

// Codes of Twill's own, from 100 on as the CNI specification asks. All other
// errors carry the specification's codes.
const (
	ErrDiffers uint = 100 // CHECK: the attachment is not as ADD left it
	ErrBridge  uint = 101 // the bridge is not one that pods of this node can use
	ErrTaken   uint = 102 // an address or a host port that was asked for belongs to another pod

	errIO = types.ErrIOFailure
)

var (
	errWanted = errors.New("must be addresses, like \"10.5.1.9\" or \"10.5.1.9,fd00:5:0:1::9\"")
	errMAC    = errors.New("must be the MAC of one interface, like \"02:00:5e:10:00:01\"")
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
	return fail(errIO, "%s: %v", doing, err)
}

// plainJSON says of a value of a wrong type which key has it and what it must be, in
// other than Go's words.
func plainJSON(err error) error {
	var bad *json.UnmarshalTypeError
	if !errors.As(err, &bad) {
		return err
	}
	must := map[reflect.Kind]string{
		reflect.Map: "an object", reflect.Struct: "an object", reflect.Bool: "true or false",
		reflect.Int: "a whole number", reflect.String: "a text", reflect.Slice: "a list",
	}[bad.Type.Kind()]
	if must == "" || bad.Field == "" {
		return err
	}
	return fmt.Errorf("%s: is a %s, must be %s", bad.Field, bad.Value, must)
}

// badFile is the error for a file of the daemon's: it cannot be read, or makes no
// sense.
func badFile(err error) error {
	var io *fs.PathError
	if errors.As(err, &io) {
		return fail(errIO, "%v", err)
	}
	return fail(types.ErrDecodingFailure, "%v", err)
}

// withCause adds to the error of an ADD that what it left behind.
func withCause(err, left error) error {
	if left == nil {
		return err
	}
	var e *types.Error
	if !errors.As(err, &e) {
		return errors.Join(err, left)
	}
	return types.NewError(e.Code, e.Msg, "not all could be taken back, DEL must: "+left.Error())
}

// as gives an error the code that STATUS must answer with. A configuration that is
// wrong is that for every verb.
func as(code uint, err error) error {
	var e *types.Error
	switch {
	case !errors.As(err, &e):
		return fail(code, "%v", err)
	case e.Code == types.ErrInvalidNetworkConfig:
		return e
	}
	return types.NewError(code, e.Msg, e.Details)
}
