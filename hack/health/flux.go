package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	kustomizev1 "github.com/fluxcd/kustomize-controller/api/v1"
	"github.com/fluxcd/pkg/runtime/cel"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"
)

// checks are a Kustomization's healthCheckExprs, by the kind they are for.
type checks map[schema.GroupVersionKind]*cel.StatusEvaluator

func readChecks(path string) (checks, error) {
	if path == "" {
		return nil, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var kustomization kustomizev1.Kustomization
	if err := yaml.UnmarshalStrict(text, &kustomization); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	found := checks{}
	for _, check := range kustomization.Spec.HealthCheckExprs {
		evaluator, err := cel.NewStatusEvaluator(&check.HealthCheckExpressions)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		found[schema.FromAPIVersionAndKind(check.APIVersion, check.Kind)] = evaluator
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s: no spec.healthCheckExprs", path)
	}
	return found, nil
}

// evaluate says Error where an expression cannot be evaluated: Flux then goes on waiting until its time-out.
func (c checks) evaluate(ctx context.Context, document *unstructured.Unstructured) (string, error) {
	if c == nil {
		return "", nil
	}
	evaluator := c[document.GroupVersionKind()]
	if evaluator == nil {
		return "", errors.New("Flux: no healthCheckExprs for " + document.GroupVersionKind().String())
	}
	result, err := evaluator.Evaluate(ctx, document)
	if err != nil {
		return "Error", nil
	}
	return result.Status.String(), nil
}
