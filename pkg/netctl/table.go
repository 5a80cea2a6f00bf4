package netctl

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// style is what a cell says beside its text; colour repeats it, never replaces it.
type style string

const (
	plain style = ""
	good  style = "\x1b[32m" // green
	doubt style = "\x1b[33m" // yellow
	bad   style = "\x1b[31m" // red
)

type cell struct {
	text  string
	style style
}

// table prints aligned columns, the last one unpadded. Nothing is cut: an
// address that is not whole is of no use.
type table struct {
	colour bool
	rows   [][]cell
}

func (t *table) row(cells ...cell) { t.rows = append(t.rows, cells) }

func (t *table) header(names ...string) {
	t.row(texts(names...)...)
}

// dropEmpty leaves out those of the named columns that hold dashes alone.
func (t *table) dropEmpty(names ...string) {
	head := t.rows[0]
	for i := len(head) - 1; i >= 0; i-- {
		says := func(row []cell) bool { return row[i].text != "-" }
		if !slices.Contains(names, head[i].text) || slices.ContainsFunc(t.rows[1:], says) {
			continue
		}
		for r, row := range t.rows {
			t.rows[r] = slices.Delete(row, i, i+1)
		}
	}
}

func texts(s ...string) []cell {
	out := make([]cell, len(s))
	for i, x := range s {
		out[i].text = x
	}
	return out
}

func (t *table) print(w io.Writer) error {
	var width []int
	for _, row := range t.rows {
		for i, c := range row {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], utf8.RuneCountInString(c.text))
		}
	}
	var b strings.Builder
	for _, row := range t.rows {
		for i, c := range row {
			b.WriteString(t.paint(c))
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (t *table) paint(c cell) string {
	if !t.colour || c.style == plain || c.text == "" {
		return c.text
	}
	return string(c.style) + c.text + "\x1b[0m"
}

// list prints addresses and the like in one cell; a dash stands for none.
func list[T fmt.Stringer](items []T) string {
	var s []string
	for _, x := range items {
		s = append(s, x.String())
	}
	return orDash(strings.Join(s, ","))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// span prints a length of time in its two largest units.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(10 * time.Microsecond).String()
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	}
}
