// Reads a JSON list of YAML texts on stdin and prints what Kubernetes' own libraries make of each, as a JSON list:
// {"documents": [...]} or {"error": "..."}. Documents are cut by apimachinery's YAMLReader and read by
// sigs.k8s.io/yaml in its strict form, as the API server reads a request body.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	apiyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

type answer struct {
	Documents []json.RawMessage `json:"documents"`
	Error     string            `json:"error,omitempty"`
}

func read(text string) answer {
	reader := apiyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
	found := answer{Documents: []json.RawMessage{}}
	for {
		chunk, err := reader.Read()
		if err != nil && !errors.Is(err, io.EOF) {
			return answer{Error: err.Error()}
		}
		if len(chunk) != 0 {
			document, problem := yaml.YAMLToJSONStrict(chunk)
			if problem != nil {
				return answer{Error: problem.Error()}
			}
			found.Documents = append(found.Documents, document)
		}
		if err != nil || len(chunk) == 0 {
			return found
		}
	}
}

func main() {
	var texts []string
	if err := json.NewDecoder(os.Stdin).Decode(&texts); err != nil {
		fmt.Fprintln(os.Stderr, "stdin is no JSON list of texts:", err)
		os.Exit(1)
	}
	answers := []answer{}
	for _, text := range texts {
		answers = append(answers, read(text))
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(answers); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
