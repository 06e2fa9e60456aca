// Generates text on an iPhone (iOS 18) or a Mac (macOS 15) with the package that
// `mobilellm lower --target coreml` writes. docs/formats.md describes the package.
//
// NOT RUN YET: it was written without a Mac. A test checks its types against stubs of Core ML on
// Linux (tests/test_ios.py). `CoreMLRunner` in exporter/backends/coreml/lowering.py does the same in
// Python and is tested.
//
// Add model.mlpackage to an app, which Xcode compiles to model.mlmodelc, and tokenize with
// tokenizer.json from the same folder (huggingface/swift-transformers reads it):
//
//     let decoder = try await Decoder(modelURL: Bundle.main.url(forResource: "model", withExtension: "mlmodelc")!)
//     for try await token in decoder.generate(prompt: tokenIDs, limit: 256) { … }

import CoreML
import Foundation

enum DecoderError: Error {
    case notOurPackage
    case textTooLong(tokens: Int, context: Int)
    /// The Neural Engine runs only packages that were lowered with `compute=neural_engine`.
    case notForNeuralEngine
    /// Swift has no Float16 on Intel: lower the package with `activations=float32`, or run on Arm.
    case noFloat16
}

/// Generates one text at a time: two predictions must not use a state at the same time.
@available(iOS 18, macOS 15, *)
final class Decoder: @unchecked Sendable {
    /// The two functions of the package. They share its weights, and both get the same state.
    private let prefill: MLModel
    private let decode: MLModel
    private var state: MLState
    /// The number of tokens in the state.
    private var position = 0

    /// The number of tokens that fit into the cache, and the number that `prefill` reads at once.
    let context: Int
    let chunk: Int
    /// Each of these tokens ends a text.
    let endTokens: Set<Int>
    /// The name of the output: `logits`, or `token` if the program finds the most likely token.
    private let output: String

    /// Give `.cpuAndNeuralEngine` for a package that was lowered with `compute=neural_engine`.
    /// That form was not run on hardware. Any other package stays on CPU and GPU, because the Neural
    /// Engine computes int4 in blocks wrongly (github.com/apple/coreai-models/issues/279).
    init(modelURL: URL, computeUnits: MLComputeUnits = .cpuAndGPU) async throws {
        func load(_ function: String) async throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = computeUnits
            configuration.functionName = function
            return try await MLModel.load(contentsOf: modelURL, configuration: configuration)
        }
        prefill = try await load("prefill")
        decode = try await load("decode")
        state = decode.makeState()

        let described = decode.modelDescription.metadata[.creatorDefinedKey] as? [String: String]
        guard let facts = described,
            let context = facts["max_context"].flatMap({ Int($0) }),
            let chunk = facts["prefill"].flatMap({ Int($0) }),
            let output = facts["output"],
            let ends = facts["eos_token_ids"]?.data(using: .utf8)
        else { throw DecoderError.notOurPackage }
        let usesNeuralEngine = computeUnits == .all || computeUnits == .cpuAndNeuralEngine
        guard !usesNeuralEngine || facts["compute"] == "neural_engine" else {
            throw DecoderError.notForNeuralEngine
        }
        self.context = context
        self.chunk = chunk
        self.output = output
        endTokens = Set(try JSONDecoder().decode([Int].self, from: ends))
    }

    /// Starts a new text with these tokens. Returns the most likely next token.
    ///
    /// Every call reads a whole chunk. The last chunk is padded: the program ignores tokens from
    /// `length` on and does not cache them. A chunk that would end beyond the cache begins earlier;
    /// tokens that are read twice get the same keys and values again.
    func start(_ tokens: [Int]) async throws -> Int {
        guard !tokens.isEmpty, tokens.count <= context else {
            throw DecoderError.textTooLong(tokens: tokens.count, context: context)
        }
        state = decode.makeState()
        position = 0
        var next = 0
        while position < tokens.count {
            let begin = min(position, context - chunk)
            let end = min(begin + chunk, tokens.count)
            let padding = Array(repeating: 0, count: chunk - (end - begin))
            next = try await run(
                prefill,
                [
                    "input_ids": feature(tokens[begin..<end] + padding, shape: [1, chunk]),
                    "position": feature([begin], shape: [1]),
                    "length": feature([end - begin], shape: [1]),
                ])
            position = end
        }
        return next
    }

    /// Continues the text by one token. Returns the most likely next token.
    func step(_ token: Int) async throws -> Int {
        guard position < context else {
            throw DecoderError.textTooLong(tokens: position + 1, context: context)
        }
        let next = try await run(
            decode,
            [
                "input_ids": feature([token], shape: [1, 1]),
                "position": feature([position], shape: [1]),
            ])
        position += 1
        return next
    }

    /// Generates tokens greedily, at most `limit`. Stops at a token that ends the text (which is not
    /// returned), or when the cache is full. A limit of 0 or less gives no token.
    func generate(prompt: [Int], limit: Int) -> AsyncThrowingStream<Int, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    var count = 0
                    var token = limit > 0 ? try await self.start(prompt) : 0
                    while count < limit, !Task.isCancelled, !self.endTokens.contains(token) {
                        continuation.yield(token)
                        count += 1
                        if count == limit || self.position == self.context { break }
                        token = try await self.step(token)
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func run(_ model: MLModel, _ inputs: [String: MLFeatureValue]) async throws -> Int {
        let features = try MLDictionaryFeatureProvider(dictionary: inputs)
        let outputs = try await model.prediction(from: features, using: state)
        guard let value = outputs.featureValue(for: output) else { throw DecoderError.notOurPackage }
        if output == "token" {
            guard let token = value.shapedArrayValue(of: Int32.self) else {
                throw DecoderError.notOurPackage
            }
            return Int(token.scalars[0])
        }
        // [1, 1, vocab_size], float16 or float32: the target's `activations`.
        if let logits = value.shapedArrayValue(of: Float.self) { return likeliest(logits.scalars) }
        #if arch(arm64)
            if let logits = value.shapedArrayValue(of: Float16.self) {
                return likeliest(logits.scalars)
            }
            throw DecoderError.notOurPackage
        #else
            throw DecoderError.noFloat16
        #endif
    }
}

private func feature<Tokens: Collection>(_ values: Tokens, shape: [Int]) -> MLFeatureValue
where Tokens.Element == Int {
    MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: values.map { Int32($0) }, shape: shape))
}

private func likeliest<Number: Comparable>(_ logits: [Number]) -> Int {
    logits.indices.max { logits[$0] < logits[$1] } ?? 0
}
