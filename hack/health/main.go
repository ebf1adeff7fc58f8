// health says what the tools of GitOps make of FineTuneJobs, by those tools' own code:
//
//	health [-argocd ConfigMap] [-flux Kustomization] [-for condition=NAME[=VALUE]]... < documents
//
// It reads documents, YAML or JSON, from standard input and writes one line of JSON for each. Nothing is asked of a cluster.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	fluxstatus "github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

// answer is what the tools say of one document. Of a tool that was not asked for, nothing.
type answer struct {
	KStatus   string          `json:"kstatus"`
	Flux      string          `json:"flux"`
	FluxExprs string          `json:"fluxExprs,omitempty"`
	ArgoCD    *health         `json:"argocd,omitempty"`
	Kubectl   map[string]bool `json:"kubectl,omitempty"`
}

func main() {
	var conditions []string
	argocd := flag.String("argocd", "", "a ConfigMap argocd-cm with the health check")
	flux := flag.String("flux", "", "a Flux Kustomization with healthCheckExprs")
	flag.Func("for", "what kubectl wait is to wait for; may be repeated", func(condition string) error {
		conditions = append(conditions, condition)
		return nil
	})
	flag.Parse()
	if err := run(*argocd, *flux, conditions); err != nil {
		fmt.Fprintln(os.Stderr, "health:", err)
		os.Exit(1)
	}
}

func run(argocd, flux string, conditions []string) error {
	script, err := readScript(argocd)
	if err != nil {
		return err
	}
	checks, err := readChecks(flux)
	if err != nil {
		return err
	}
	waits, err := newWaits(conditions)
	if err != nil {
		return fmt.Errorf("kubectl wait: %w", err)
	}
	decoder, encoder := yaml.NewYAMLOrJSONDecoder(os.Stdin, 4096), json.NewEncoder(os.Stdout)
	for number := 1; ; number++ {
		var document unstructured.Unstructured
		if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("document %d: %w", number, err)
		}
		said, err := ask(&document, script, checks, waits)
		if err != nil {
			return fmt.Errorf("document %d: %w", number, err)
		}
		if err := encoder.Encode(said); err != nil {
			return err
		}
	}
}

func ask(document *unstructured.Unstructured, script string, checks checks, waits waits) (*answer, error) {
	plain, err := status.Compute(document)
	if err != nil {
		return nil, fmt.Errorf("kstatus: %w", err)
	}
	forked, err := fluxstatus.Compute(document)
	if err != nil {
		return nil, fmt.Errorf("kstatus of Flux: %w", err)
	}
	said := &answer{KStatus: plain.Status.String(), Flux: forked.Status.String()}
	if said.FluxExprs, err = checks.evaluate(context.Background(), document); err != nil {
		return nil, err
	}
	if script != "" {
		if said.ArgoCD, err = resourceHealth(document, script); err != nil {
			return nil, fmt.Errorf("Argo CD: %w", err)
		}
	}
	if said.Kubectl, err = waits.over(document); err != nil {
		return nil, fmt.Errorf("kubectl wait: %w", err)
	}
	return said, nil
}
