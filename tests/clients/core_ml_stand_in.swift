// What swift-transformers' LanguageModel and Generation need of Core ML and of their own tokenizers,
// where there is no Core ML. A call of the model is written to the output as a line of JSON, and its
// logits are read from the input: tests/clients/test_swift_transformers.py computes them.
// Written from Apple's published documentation and from the names that swift-transformers uses.

import Foundation

// Core ML's tensors.

public protocol MLTensorScalar { static var kind: String { get } }
extension Int32: MLTensorScalar { public static let kind = "int32" }
extension Float: MLTensorScalar { public static let kind = "fp32" }
extension Float16: MLTensorScalar { public static let kind = "fp16" }

public struct MLShapedArray<Scalar> { public let scalars: [Scalar] }

/// Values in the order of C. All of them are held as Double.
public struct MLTensor {
    public let shape: [Int]
    public let scalarType: any MLTensorScalar.Type
    let values: [Double]

    init(_ values: [Double], _ shape: [Int], _ type: any MLTensorScalar.Type) {
        precondition(values.count == shape.reduce(1, *))
        (self.values, self.shape, scalarType) = (values, shape, type)
    }

    public init(_ scalars: [Int32]) {
        self.init(scalars.map(Double.init), [scalars.count], Int32.self)
    }

    public init(shape: [Int], scalars: [Int32]) {
        self.init(scalars.map(Double.init), shape, Int32.self)
    }

    public init(repeating value: Int32, shape: [Int]) {
        self.init(Array(repeating: Double(value), count: shape.reduce(1, *)), shape, Int32.self)
    }

    public init(zeros shape: [Int], scalarType: any MLTensorScalar.Type) {
        self.init(Array(repeating: 0, count: shape.reduce(1, *)), shape, scalarType)
    }

    public init(
        randomUniform shape: [Int], in range: Range<Float>, scalarType: any MLTensorScalar.Type
    ) { fatalError("sampling is not tried") }

    public init(concatenating parts: [MLTensor], alongAxis axis: Int) {
        precondition(axis == -1 && parts.allSatisfy { $0.shape.count == 2 && $0.shape[0] == 1 })
        let values = parts.flatMap(\.values)
        self.init(values, [1, values.count], parts[0].scalarType)
    }

    public var rank: Int { shape.count }

    /// One index for each axis from the first on: nil keeps the axis, a number takes one entry of it.
    public subscript(_ indices: Int?...) -> MLTensor {
        var result = self
        for axis in indices.indices.reversed() {
            guard let index = indices[axis] else { continue }
            result = result.entry(index < 0 ? index + shape[axis] : index, of: axis)
        }
        return result
    }

    private func entry(_ index: Int, of axis: Int) -> MLTensor {
        precondition((0..<shape[axis]).contains(index))
        let inner = shape[(axis + 1)...].reduce(1, *)
        let outer = shape[..<axis].reduce(1, *)
        let kept = (0..<outer).flatMap { row in
            let start = (row * shape[axis] + index) * inner
            return values[start..<(start + inner)]
        }
        return MLTensor(kept, Array(shape[..<axis] + shape[(axis + 1)...]), scalarType)
    }

    public func expandingShape(at axis: Int) -> MLTensor {
        var sizes = shape
        sizes.insert(1, at: axis)
        return reshaped(to: sizes)
    }

    public func reshaped(to sizes: [Int]) -> MLTensor { MLTensor(values, sizes, scalarType) }

    public func cast(to type: any MLTensorScalar.Type) -> MLTensor { MLTensor(values, shape, type) }

    public func argmax(alongAxis axis: Int) -> MLTensor {
        precondition(axis == -1)
        let size = shape[rank - 1]
        let places = stride(from: 0, to: values.count, by: size).map { start in
            let row = values[start..<(start + size)]
            return Double(row.firstIndex(of: row.max()!)! - start)
        }
        return MLTensor(places, Array(shape.dropLast()), Int32.self)
    }

    public func argmin(alongAxis axis: Int) -> MLTensor { fatalError("sampling is not tried") }
    public func softmax(alongAxis axis: Int) -> MLTensor { fatalError("sampling is not tried") }
    public func cumulativeSum(alongAxis axis: Int) -> MLTensor { fatalError("sampling is not tried") }

    public func shapedArray(of type: Int32.Type) async -> MLShapedArray<Int32> {
        MLShapedArray(scalars: values.map { Int32($0) })
    }
}

infix operator .<: ComparisonPrecedence
public func .< (one: MLTensor, other: MLTensor) -> MLTensor { fatalError("sampling is not tried") }
public func * (one: MLTensor, factor: Float) -> MLTensor { fatalError("sampling is not tried") }
public func + (one: MLTensor, other: MLTensor) -> MLTensor { fatalError("sampling is not tried") }

// Core ML's models.

public enum MLComputeUnits { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

public final class MLModelConfiguration {
    public init() {}
    public var computeUnits: MLComputeUnits = .all
    public var modelDisplayName: String?
}

public struct MLModelMetadataKey: Hashable {
    let name: String
    public static let description = MLModelMetadataKey(name: "description")
    public static let creatorDefinedKey = MLModelMetadataKey(name: "creatorDefined")
}

public enum MLMultiArrayShapeConstraintType { case unspecified, enumerated, range }

public struct MLMultiArrayShapeConstraint {
    public let type: MLMultiArrayShapeConstraintType
    public let sizeRangeForDimension: [Any]
    public let enumeratedShapes: [[NSNumber]] = []
}

public struct MLMultiArrayConstraint {
    public let shape: [NSNumber]
    public let shapeConstraint: MLMultiArrayShapeConstraint
}

public struct MLFeatureDescription {
    public let name: String
    public let multiArrayConstraint: MLMultiArrayConstraint?
}

public struct MLModelDescription {
    public let metadata: [MLModelMetadataKey: Any]
    public let inputDescriptionsByName: [String: MLFeatureDescription]
    public let outputDescriptionsByName: [String: MLFeatureDescription]
    public let stateDescriptionsByName: [String: MLFeatureDescription]
}

public final class MLState {}

/// What test_swift_transformers.py passes: the description of a package, and what the app does.
struct Job: Decodable {
    let inputs: [String: [[Int]]]  // the lowest and the highest size of each axis
    let outputs, states: [String]
    let metadata: [String: String]
    let prompts: [String]
    let count, end: Int
}

struct Request: Encodable {
    let inputs: [String: Given]
    struct Given: Encodable {
        let kind: String
        let shape: [Int]
        let values: [Double]
    }
}

struct Answer: Decodable {
    let shape: [Int]
    let values: [Double]
}

public final class MLModel {
    public let modelDescription: MLModelDescription
    public let configuration: MLModelConfiguration

    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
        let found = try JSONDecoder().decode(Job.self, from: Data(contentsOf: url))
        self.configuration = configuration
        func features(_ names: [String]) -> [String: MLFeatureDescription] {
            Dictionary(uniqueKeysWithValues: names.map {
                ($0, MLFeatureDescription(name: $0, multiArrayConstraint: nil))
            })
        }
        let inputs = found.inputs.map { name, limits in
            let ranges = limits.map { NSRange(location: $0[0], length: $0[1] - $0[0] + 1) }
            let constraint = MLMultiArrayShapeConstraint(type: .range, sizeRangeForDimension: ranges)
            let shape = limits.map { NSNumber(value: $0[0]) }
            return (name, MLFeatureDescription(
                name: name,
                multiArrayConstraint: MLMultiArrayConstraint(shape: shape, shapeConstraint: constraint)))
        }
        modelDescription = MLModelDescription(
            metadata: [.creatorDefinedKey: found.metadata],
            inputDescriptionsByName: Dictionary(uniqueKeysWithValues: inputs),
            outputDescriptionsByName: features(found.outputs),
            stateDescriptionsByName: features(found.states))
    }

    public static func compileModel(at url: URL) async throws -> URL {
        fatalError("only type-checked")
    }

    public func makeState() -> MLState {
        say("new state")
        return MLState()
    }

    public func prediction(from inputs: [String: MLTensor]) async throws -> [String: MLTensor] {
        fatalError("a package with states was called without them")
    }

    public func prediction(
        from inputs: [String: MLTensor], using state: MLState
    ) async throws -> [String: MLTensor] {
        let given = inputs.mapValues {
            Request.Given(kind: $0.scalarType.kind, shape: $0.shape, values: $0.values)
        }
        say(String(decoding: try JSONEncoder().encode(Request(inputs: given)), as: UTF8.self))
        let line = Data(readLine()!.utf8)
        let answer = try JSONDecoder().decode(Answer.self, from: line)
        return ["logits": MLTensor(answer.values, answer.shape, Float16.self)]
    }
}

func say(_ line: String) {
    FileHandle.standardOutput.write(Data((line + "\n").utf8))
}

// The parts of swift-transformers that need other packages: the hub, and tokenizers.

public struct Config {
    public var modelType: Config { self }
    public var taskSpecificParams: Config { self }
    public var textGeneration: Config { self }
    public var doSample: Config { self }
    public var bosTokenId: Config { self }
    public var eosTokenId: Config { self }
    public func string() -> String? { nil }
    public func boolean() -> Bool? { nil }
    public func integer() -> Int? { nil }
}

public final class LanguageModelConfigurationFromHub {
    public init(modelName: String) { say("hub \(modelName)") }
    public var modelConfig: Config? { get async throws { nil } }
    public var tokenizerConfig: Config? { get async throws { nil } }
    public var tokenizerData: Config { get async throws { Config() } }
}

public protocol Tokenizer {
    var bosTokenId: Int? { get }
    var eosTokenId: Int? { get }
    func encode(text: String) -> [Int]
    func decode(tokens: [Int]) -> String
}

public enum AutoTokenizer {
    static func from(modelFolder: URL) async throws -> Tokenizer { fatalError("only type-checked") }

    static func from(tokenizerConfig: Config, tokenizerData: Config) throws -> Tokenizer {
        fatalError("the test gives the tokenizer")
    }
}

/// Processors of logits. None of them changes the token with the highest one.
public struct Unchanged: LogitsProcessor {
    public func callAsFunction(_ inputIds: MLTensor, _ scores: MLTensor) async -> MLTensor { scores }
}
func RepetitionPenaltyLogitsProcessor(penalty: Float) throws -> Unchanged { Unchanged() }
func TemperatureLogitsWarper(temperature: Float) throws -> Unchanged { Unchanged() }
func TopKLogitsWarper(topK: Int) throws -> Unchanged { Unchanged() }
func TopPLogitsWarper(topP: Float) throws -> Unchanged { Unchanged() }
func MinPLogitsWarper(minP: Float) throws -> Unchanged { Unchanged() }

// The program: an app that generates from ids, which stand for a text.

struct Ids: Tokenizer {
    let bosTokenId: Int? = nil
    let eosTokenId: Int?
    func encode(text: String) -> [Int] { text.split(separator: " ").map { Int($0)! } }
    func decode(tokens: [Int]) -> String { tokens.map(String.init).joined(separator: " ") }
}

func app(_ path: String) async throws {
    let url = URL(fileURLWithPath: path)
    let job = try JSONDecoder().decode(Job.self, from: Data(contentsOf: url))
    let model = try LanguageModel.loadCompiled(url: url, tokenizer: Ids(eosTokenId: job.end))
    say("name \(model.modelName)")
    var config = model.defaultGenerationConfig
    config.maxNewTokens = job.count
    for prompt in job.prompts {
        let text = try await model.generate(config: config, prompt: prompt)
        say("text \(text)")
    }
}

let finished = DispatchSemaphore(value: 0)
Task {
    do { try await app(CommandLine.arguments.last!) } catch { say("error \(error)") }
    finished.signal()
}
finished.wait()
