// Text on an iPhone (iOS 18) or a Mac (macOS 15) from what `mobilellm lower --target coreml` makes.
//
// NOT COMPILED AND NOT RUN YET: it was written without a Mac. `CoreMLRunner` in
// exporter/backends/coreml.py does the same in Python and is tested.
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
}

/// One text at a time: a state must not be used by two predictions at once.
@available(iOS 18, macOS 15, *)
final class Decoder: @unchecked Sendable {
    /// Both functions of one package. They share its weights, and the state that is given to both.
    private let prefill: MLModel
    private let decode: MLModel
    private var state: MLState
    /// How many tokens the state holds.
    private var position = 0

    /// How many tokens the cache has room for, and how many `prefill` reads at once.
    let context: Int
    let chunk: Int
    /// Any of these ends a text.
    let endTokens: Set<Int>
    /// `logits`, or `token` where the program finds the likeliest token itself.
    private let output: String

    init(modelURL: URL, computeUnits: MLComputeUnits = .cpuAndNeuralEngine) async throws {
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
        self.context = context
        self.chunk = chunk
        self.output = output
        endTokens = Set(try JSONDecoder().decode([Int].self, from: ends))
    }

    /// Start a new text with these tokens; the likeliest next one.
    ///
    /// Every call reads a whole chunk. The last one is padded: the program neither keeps nor looks
    /// at what lies beyond `length`. A chunk that would end beyond the cache begins earlier, and
    /// what is read twice is written twice, the same.
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

    /// Continue the text by one token; the likeliest next one.
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

    /// New tokens, greedily, up to one that ends a text (which is not among them), the limit, or
    /// the end of the cache.
    func generate(prompt: [Int], limit: Int) -> AsyncThrowingStream<Int, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    var token = try await self.start(prompt)
                    for count in 1...max(limit, 1) where !Task.isCancelled {
                        if self.endTokens.contains(token) { break }
                        continuation.yield(token)
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
        // [1, 1, vocab_size], float16 or float32 as the package was lowered.
        if let logits = value.shapedArrayValue(of: Float16.self) { return likeliest(logits.scalars) }
        if let logits = value.shapedArrayValue(of: Float.self) { return likeliest(logits.scalars) }
        throw DecoderError.notOurPackage
    }
}

private func feature<Tokens: Collection>(_ values: Tokens, shape: [Int]) -> MLFeatureValue
where Tokens.Element == Int {
    MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: values.map { Int32($0) }, shape: shape))
}

private func likeliest<Number: Comparable>(_ logits: [Number]) -> Int {
    logits.indices.max { logits[$0] < logits[$1] } ?? 0
}
